"""The client's end of a link: a window of sends that are not lost, and requests with one reply each."""

from atpo_async.links.client.client import Client, LinkStats
from atpo_async.links.client.routed import RoutedClient

__all__ = ["Client", "LinkStats", "RoutedClient"]
