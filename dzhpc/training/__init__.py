"""What happens in a step on all ranks."""
