"""Help for editors: what is wrong, what may stand here, what this means, where it comes from.

Everything but `server.py` is plain Python: a text and a place in it give items. Nothing of the
user's is imported, and no text makes it fail.
"""
