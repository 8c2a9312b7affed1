-- Which files did no boot read, and how much would the image shrink without them, by directory?
-- duckdb -f docs/never-read.sql, in a folder with map.parquet and trace.parquet. For one filesystem; with several, group by volume too.

create or replace view filesystems as select unnest(filesystems, recursive := true) from 'map.parquet';
create or replace view names as select unnest(names, recursive := true) from 'map.parquet';
create or replace view extents as select unnest(extents, recursive := true) from 'map.parquet';
create or replace view touched as select unnest(o, recursive := true) from (select unnest(objects) as o from 'trace.parquet');

with recursive paths(inode, path, top) as (
    select root, '', '/' from filesystems
    union all
    select names.inode, path || '/' || decode(name), case when path in ('', '/usr', '/var') then path || '/' || decode(name) else top end
    from paths join names on names.parent = paths.inode
),
size as (select inode, sum(length) as bytes from extents where kind = 'data' and inode is not null group by inode)
select top as directory,
       count(*) as files,
       count(*) filter (inode not in (select inode from touched where inode is not null)) as never_read,
       sum(bytes) as bytes,
       sum(bytes) filter (inode not in (select inode from touched where inode is not null)) as never_read_bytes
from paths join size using (inode)
group by top
order by never_read_bytes desc nulls last;
