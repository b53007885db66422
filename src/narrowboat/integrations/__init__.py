"""Budgets inside other people's training loops; each file needs its library, which is imported only with that file."""
