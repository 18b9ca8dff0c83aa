"""What people use from a shell."""
