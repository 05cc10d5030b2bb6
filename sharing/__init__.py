"""Model cards and the web app."""
