"""The loss kernel of a trained model: chains around its weights, their losses, the covariance and what is read from it.

``sampling`` moves the chains, ``collector`` takes their draws, ``draws`` says which count, ``covariance`` and ``traces``
accumulate them, ``run`` is the whole way, ``kernel`` the result and ``views`` its two forms, ``estimators``, ``convergence``
and ``diagnostics`` what is computed from it, ``figures``, ``report``, ``tables`` and ``cli`` what a person sees.
"""
