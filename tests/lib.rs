//! Integration fixtures: the only crate that may import everything.
