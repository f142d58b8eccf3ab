"""Screens and widgets. They draw what a session holds and post what a person asks for; nothing here loads torch."""
