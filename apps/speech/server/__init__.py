"""The service of an exported recogniser: live audio over WebSocket, files over HTTP, and a page. No torch."""
