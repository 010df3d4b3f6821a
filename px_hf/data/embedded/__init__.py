"""Small real tasks that need no network: digits, letters, scenes."""
