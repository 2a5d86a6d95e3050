// Reads memory and does nothing else: no kernel that has to see these bytes is faster.
extern "C" __global__ void __launch_bounds__(256)
    read_all(uint4 const* data, unsigned long long count, unsigned* sink) {
  unsigned long long const step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned seen = 0;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < 4; ++u) seen ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < count; i += step) seen ^= data[i].x;
  if (seen == 0x12345679u) *sink = seen;  // keeps the loads; the value is as good as impossible
}
