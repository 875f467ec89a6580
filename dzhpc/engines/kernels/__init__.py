"""Compiled passes and convolutions of our own."""
