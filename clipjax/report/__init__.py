"""`clipjax report`: runs side by side, on one page that opens offline."""
