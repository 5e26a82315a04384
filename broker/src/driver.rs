//! The one task that owns a Core. stub
