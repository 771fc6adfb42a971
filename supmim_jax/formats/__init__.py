"""The ViT files of other libraries, in terms of our parameters and config.

Everything here except `files` is pure: tables that map names to names, and JSON documents.
"""
