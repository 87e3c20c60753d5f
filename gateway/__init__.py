"""The only door: HTTP and WebSocket in, frames out."""
