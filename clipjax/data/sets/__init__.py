"""Datasets that clipjax makes itself: emoji and openclipart."""
