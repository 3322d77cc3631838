"""Turns, trees and batches in memory."""
