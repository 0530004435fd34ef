"""What a person sees: progress on stderr, results on stdout."""
