"""The operators' pages on the admin listener: server-rendered, no build step, no CDN."""
