//! Real QUIC over loopback: who gets in, and the dialler's and acceptor's loops.
