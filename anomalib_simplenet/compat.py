"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""
