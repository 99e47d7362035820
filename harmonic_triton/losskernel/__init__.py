"""The loss kernel of a trained model: chains around its weights, their losses, the covariance and what is read from it.

``sampling`` moves the chains, ``collector`` takes their draws, ``covariance`` and ``traces`` accumulate them, ``kernel`` is the
result, ``estimators`` what is computed from it, ``report`` and ``cli`` what a person sees.
"""
