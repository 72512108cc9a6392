"""Alembic's scripts for the catalogue; `Catalogue.migrate` runs them."""
