"""Everything that imports torch. Of `app` it imports `app.contract` and `app.settings` alone."""
