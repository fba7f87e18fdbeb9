"""What a person sees of a run: the HTML page and the neighbours before and after adaptation.

Importing this package loads neither Jinja2 nor scikit-learn.
"""
