"""WarmServe client."""
