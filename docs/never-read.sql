-- Which files did no boot read, and how much would the image shrink without them, by directory?
-- virt-bmap sql -f never-read.sql map.parquet trace.parquet

with here as (
    select *, (device, inode) in (select (device, inode) from touched where inode is not null) as was_read,
           regexp_extract(path, '^(/usr/[^/]+|/var/[^/]+|/[^/]+)') as directory
    from files where type = 'file'
)
select device, directory, count(*) as files, count(*) filter (not was_read) as never_read,
       sum(allocated)::bigint as bytes, coalesce(sum(allocated) filter (not was_read), 0)::bigint as never_read_bytes
from here group by all order by never_read_bytes desc, directory
