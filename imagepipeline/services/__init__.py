"""Remote and local models that describe images and embed texts, and the notifiers.

Nothing here depends on the stores or on Dagster.
"""
