"""`python -m training doctor`: what a run needs of host, network, disk and data, looked at in seconds before it starts.

Each part judges plain facts by pure functions, so that tests plant any fault; `checks` collects the facts.
"""
