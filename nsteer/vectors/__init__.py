"""Vectors outside of plans: steering by hand, chat, and files of vectors."""
