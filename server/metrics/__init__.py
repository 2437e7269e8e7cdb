"""What is measured, for Prometheus: declared, observed, read at each scrape, written as text."""
