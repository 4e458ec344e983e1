//! Benchmarks of the hot paths, each beside the thing it is compared with.
