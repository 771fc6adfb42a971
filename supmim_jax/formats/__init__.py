"""What other libraries' ViT files hold, in terms of our parameters and config.

Everything here but `files` is pure: tables from names to names, and JSON documents.
"""
