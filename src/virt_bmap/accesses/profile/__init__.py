"""What a guest needed: its reads, from one or more traces, as files and byte ranges in order of first use.

build    traces -> profile            saved    the table, its file
summary  profile -> files             compare  two profiles -> what changed from one boot to the next
exports  lists for other tools        unused   a map and a profile -> what no run touched, by directory
replay   warm a disk by a profile
"""
