"""Studies with a method of their own. Each is a package that registers what it adds, as a user's package does."""
