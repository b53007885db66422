"""Asking what would be, and changing what is: budget and admission."""
