// Attention kernels: over a paged cache, over given keys and values, and the writing of the cache.
#pragma once

#include "dense_attention.h"
#include "paged_attention.h"
