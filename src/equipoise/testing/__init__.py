"""Checks that a user can run on a method of their own, and the inputs that they need."""
