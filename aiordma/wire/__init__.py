"""The wire: bytes in, events and bytes out. Nothing here knows a clock, a loop or a socket."""
