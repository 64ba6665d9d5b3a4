"""Command line: one thin module per command, which parses, calls the front door once, and prints."""
