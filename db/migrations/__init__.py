"""Alembic's scripts: how a database of any earlier version becomes the present one."""
