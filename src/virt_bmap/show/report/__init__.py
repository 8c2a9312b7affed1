"""The report: one HTML page that needs no network, made of a map and traces.

disk      the disk as cells, each with its owner
space     bytes by directory and kind, what could be given back
files     files and their fragments
activity  what traces say: over time, by place, by object
page      all of it as data in one page
page/     the page's own HTML, CSS and JavaScript

Everything is added up before it reaches the page: its size follows the limits in these modules, not the disk.
"""
