"""Everything that knows a host."""
