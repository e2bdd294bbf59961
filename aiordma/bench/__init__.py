"""`python -m aiordma bench`: aiordma against raw blocking sockets, in alternation, every byte verified.

It uses the library as its users do, by public names alone.
"""
