//! The routing core: synchronous, sans-IO. stub
pub mod event;
/// stub
#[derive(Debug, Clone, Default)]
pub struct Stats {}
