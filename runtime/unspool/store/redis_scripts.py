"""What must happen at once on a Redis server, as Lua. Times are the server's, so that clocks need not agree.

An entry is a hash: `size`, `created`, then `version` for a head, and `value`, or `parts` and `name` where the value is
in so many keys of that name. `index` is a sorted set of keys, `used` counts bytes, `version` is the last one given.
"""

NOW = """
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
"""

# Begins with a deletion, which a server without memory permits, and whatever a script does after its first write.
FORGET = """
local function forget(entry, index, used, key)
  local size = redis.call('HGET', entry, 'size') or 0
  redis.call('DEL', entry)
  redis.call('ZREM', index, key)
  redis.call('DECRBY', used, size)
end
"""

# KEYS entry, index, used, parts...; ARGV key, size, allowed, value or name. 1 when written, 0 when it was there, and
# what went wrong: 'head', 'full', 'expired' (a part was written too long ago).
PUT = (
    NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.call('HEXISTS', KEYS[1], 'version') == 1 and 'head' or 0
end
local used = tonumber(redis.call('GET', KEYS[3]) or 0)
if used + tonumber(ARGV[2]) > tonumber(ARGV[3]) then return 'full' end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 'expired' end
end
for i = 4, #KEYS do redis.call('PERSIST', KEYS[i]) end
if #KEYS == 3 then
  redis.call('HSET', KEYS[1], 'size', ARGV[2], 'created', now, 'value', ARGV[4])
else
  redis.call('HSET', KEYS[1], 'size', ARGV[2], 'created', now, 'parts', #KEYS - 3, 'name', ARGV[4])
end
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('INCRBY', KEYS[3], ARGV[2])
return 1
"""
)

# KEYS entry, index, used, version, objects' entries...; ARGV key, expected or '', max_bytes, '1' or '' for no value,
# value, then each object's key and value. The new version, 0 when another came first, 'object', 'head' or 'full'.
SWAP = (
    NOW
    + FORGET
    + """
local old = redis.call('HMGET', KEYS[1], 'size', 'version')
if old[1] and not old[2] then return 'object' end
if (old[2] or '') ~= ARGV[2] then return 0 end
local added = #ARGV[5] - (old[1] or 0)
local new = {}
for i = 5, #KEYS do
  local value = ARGV[2 * i - 3]
  if redis.call('EXISTS', KEYS[i]) == 0 then
    new[#new + 1] = i
    added = added + #value
  elseif redis.call('HEXISTS', KEYS[i], 'version') == 1 then
    return {'head', ARGV[2 * i - 4]}
  end
end
local used = tonumber(redis.call('GET', KEYS[3]) or 0)
if added > 0 and used + added > tonumber(ARGV[3]) then return 'full' end
for _, i in ipairs(new) do
  local key, value = ARGV[2 * i - 4], ARGV[2 * i - 3]
  redis.call('HSET', KEYS[i], 'size', #value, 'created', now, 'value', value)
  redis.call('ZADD', KEYS[2], 0, key)
  redis.call('INCRBY', KEYS[3], #value)
end
local version = redis.call('INCR', KEYS[4])
if old[1] then forget(KEYS[1], KEYS[2], KEYS[3], ARGV[1]) end
if ARGV[4] == '1' then
  redis.call('HSET', KEYS[1], 'size', #ARGV[5], 'created', now, 'version', version, 'value', ARGV[5])
  redis.call('ZADD', KEYS[2], 0, ARGV[1])
  redis.call('INCRBY', KEYS[3], #ARGV[5])
end
return version
"""
)

# KEYS entry, index, used, lease, parts...; ARGV key, name of the parts or ''. 1, or 0 when the entry has other parts.
DELETE = (
    FORGET
    + """
if (redis.call('HGET', KEYS[1], 'name') or '') ~= ARGV[2] then return 0 end
if redis.call('EXISTS', KEYS[1]) == 1 then forget(KEYS[1], KEYS[2], KEYS[3], ARGV[1]) end
for i = 4, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
"""
)

# KEYS lease; ARGV holder, microseconds. The epoch, or 0 when another holds it.
LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local held = redis.call('HMGET', KEYS[1], 'holder', 'epoch', 'expires')
local other = held[1] ~= ARGV[1]
if other and tonumber(held[3] or 0) > now then return 0 end
local epoch = (held[2] or 0) + (other and 1 or 0)
local expires = string.format('%.0f', now + ARGV[2])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'epoch', epoch, 'expires', expires)
return epoch
"""

# KEYS lease; ARGV holder.
RELEASE = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('HSET', KEYS[1], 'expires', 0) end
return 1
"""
