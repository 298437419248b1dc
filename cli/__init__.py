"""Commands for people: start a simulated federation and follow it."""
