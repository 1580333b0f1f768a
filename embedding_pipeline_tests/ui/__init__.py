"""What a data engineer sees: the Dagster UI, driven in headless Chromium."""
