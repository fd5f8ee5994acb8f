"""A small web service for Kari's examples."""
