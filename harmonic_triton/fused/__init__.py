"""One head, two losses: the harmonic loss and cross-entropy of a linear head, forward and backward fused.

``options`` what a caller may ask, ``call`` a call from checks to result, ``problem`` what travels down to a backend, ``ops``
the operators and their gradients, ``results`` what a backend returns for a token, ``strategy`` which way it takes, and the
two backends ``pytorch`` and ``triton``.
"""
