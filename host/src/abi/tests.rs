//! Guests in WAT against the whole host.
