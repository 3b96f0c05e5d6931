// Matrix products of a warp (mma) and of four (wgmma). Products add up in double and are rounded once per instruction;
// hardware truncates, so this is closer to the truth than a GPU. Types: 0 f16, 1 bf16, 2 tf32, 3 s8, 4 u8, 5 e4m3, 6
// e5m2.
#pragma once
#include "memory.h"

static int size_of(int type) { return type < 2 ? 2 : type == 2 ? 4 : 1; }
static float value_of(const u8* p, int type) {
  u16 half;
  u32 word;
  memcpy(&half, p, size_of(type) == 1 ? 1 : 2);
  switch (type) {
    case 0: return from_half(half);
    case 1: return from_bfloat(half);
    case 2: return memcpy(&word, p, 4), from_tf32(word);
    case 3: return (int8_t)*p;
    case 4: return *p;
    case 5: return from_e4m3(*p);
    default: return from_half((u16)(*p << 8));
  }
}
// Where a lane's registers have their elements: rows of A or columns of B by l / 4, along K in steps of one register.
static int sum_row(int l, int r) { return (l >> 2) + 8 * (r >> 1 & 1); }
static int sum_column(int l, int r) { return (r >> 2) * 8 + (l & 3) * 2 + (r & 1); }

// a: type, b: K, c: the sums are 0 f32, 1 f16, 2 s32. Operands: D, A, B, C.
void Machine::multiply(Warp& w, const Instruction& i) {
  int K = i.b, type = i.a, per = 4 / size_of(type), span = 4 * per, n_a = 2 * K / span, n_b = K / span,
      n_sum = i.c == 1 ? 2 : 4;
  const s32 *d = i.o, *a = d + n_sum, *b = a + n_a, *c = b + n_b;
  float A[16][32], B[32][8];
  double C[16][8];
  for (int r = 0; r < n_a; r++) LANES for (int q = 0; q < per; q++)
        A[(l >> 2) + 8 * (r & 1)][(l & 3) * per + q + span * (r >> 1)] =
            value_of((const u8*)(from<u32>(w, a[r]) + l) + q * 4 / per, type);
  for (int r = 0; r < n_b; r++) LANES for (int q = 0; q < per; q++)
    B[(l & 3) * per + q + span * r][l >> 2] = value_of((const u8*)(from<u32>(w, b[r]) + l) + q * 4 / per, type);
  for (int r = 0; r < 4; r++) LANES {
    u32 x = from<u32>(w, c[i.c == 1 ? r >> 1 : r])[l];
    C[sum_row(l, r)][sum_column(l, r)] = i.c == 0   ? as<float>(x)
                                         : i.c == 2 ? (double)(s32)x
                                                    : from_half((u16)(x >> 16 * (r & 1)));
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) C[m][n] += (double)A[m][k] * B[k][n];
  for (int r = 0; r < 4; r++) LANES {
    double sum = C[sum_row(l, r)][sum_column(l, r)];
    u32& x = to<u32>(w, d[i.c == 1 ? r >> 1 : r])[l];
    if (i.c == 0) x = as<u32>((float)sum);
    else if (i.c == 2) x = (u32)(s64)sum;
    else if (r & 1) x = (x & 0xffff) | (u32)to_half(sum) << 16;
    else x = to_half(sum);
  }
}

// The address of one element of a wgmma's matrix: rows of 8 in a pattern of 16 to 128 bytes, whose parts are swizzled.
static u32 element_at(u64 descriptor, int outer, int k, bool transposed, int size) {
  u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
  u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4, at;
  int mode = descriptor >> 62 & 3, width = mode == 0 ? 16 : 256 >> mode, bits = mode ? 4 - mode : 0;
  if (transposed) {
    int bytes = outer * size;
    at = bytes % width + bytes / width * (mode ? leading : stride) + (k & 7) * width +
         (k >> 3) * (mode ? stride : leading);
  } else {
    int bytes = k * size;
    at = (outer & 7) * width + (outer >> 3) * stride + (mode ? bytes : (bytes >> 4) * leading + (bytes & 15));
  }
  at += start;
  return at ^ (at >> 7 & ((1u << bits) - 1)) << 4;
}
void Machine::tile(const At& at, u64 descriptor, int first, int n, int K, bool transposed, int type,
                   std::vector<float>& values, std::vector<u32>* cells) {
  int size = size_of(type);
  values.resize(n * K);
  for (int row = 0; row < n; row++) for (int k = 0; k < K; k++) {
    u32 address = element_at(descriptor, first + row, k, transposed, size);
    if (address < SHARED_BASE || address + size > SHARED_BASE + shared_bytes) {
      report(SHARED_BOUNDS, at, address, 1);
      values[row * K + k] = NAN;
      continue;
    }
    if (cells)
      for (int q = 0; q < size; q++) cells->push_back(address - SHARED_BASE + q);
    values[row * K + k] = value_of(&at.c.shared[address - SHARED_BASE], type);
  }
}
// Of the bytes that a product reads: each is written, has arrived, is fenced and ordered. Bytes become cells.
void Machine::check_product(const At& at, std::vector<u32>& cells) {
  Cta& c = at.c;
  for (u32& q : cells) {
    if (c.state[q] == UNDER_WAY) report(IN_FLIGHT, at, SHARED_BASE + q, 1);
    if (c.state[q] == NEVER_WRITTEN) report(SHARED_UNWRITTEN, at, SHARED_BASE + q, 1);
    q /= shared_grain;
  }
  std::sort(cells.begin(), cells.end());
  cells.erase(std::unique(cells.begin(), cells.end()), cells.end());
  for (u32 g : cells) {
    c.read_by_products[g]++;
    if (!schedule.races) continue;
    const Access& write = c.cells[g].write;
    if (write.thread) {
      u64 when = c.written_at[g];
      bool fenced = c.fenced_at[(write.thread - 1) % threads] > when || c.fenced_at[at.thread()] > when;
      if (!fenced) conflict(NO_PROXY_FENCE, write, at, SHARED_BASE + g * shared_grain, 1);
    }
    on_read(c.cells[g], at, SHARED_BASE + g * shared_grain, 1, false, true);
  }
}
// a: type, b: N, c: 1 A is in shared memory, 2 A is transposed, 4 B is; d: 1 A is negated, 2 B is. The rest: D, A, B.
void Machine::start_product(Cta& c, Warp& w, const Instruction& i, int pc, bool adds) {
  Product p{&i, pc, w.product_group, 0, true, {}, {}, {}, {}};
  int n_sum = i.b / 2, K = 32 / size_of(i.a), per = 4 / size_of(i.a);
  const s32* o = kernel.extra.data() + i.imm;
  At at{c, w, 0, pc};
  if (adds)
    for (auto& other : w.products) p.has_sum &= kernel.extra[other.i->imm] != o[0];
  if (p.has_sum) {
    p.sum.assign(16 * i.b, 0.0f);
    if (adds)
      for (int r = 0; r < n_sum; r++) LANES p.sum[sum_row(l, r) * i.b + sum_column(l, r)] = from<float>(w, o[r])[l];
  }
  std::vector<u32> a_cells;
  if (i.c & 1) {
    tile(at, from<u64>(w, o[n_sum])[0], 16 * (w.id & 3), 16, K, i.c & 2, i.a, p.a, &a_cells);
  } else {
    p.a.assign(16 * K, 0.0f);
    for (int r = 0; r < 4; r++) LANES for (int q = 0; q < per; q++) {
      const u8* register_ = (const u8*)(from<u32>(w, o[n_sum + r]) + l);
      p.a[((l >> 2) + 8 * (r & 1)) * K + (l & 3) * per + q + K / 2 * (r >> 1)] = value_of(register_ + q * 4 / per, i.a);
    }
  }
  p.b_descriptor = from<u64>(w, o[n_sum + (i.c & 1 ? 1 : 4)])[0];
  tile(at, p.b_descriptor, 0, i.b, K, i.c & 4, i.a, p.b, &p.cells);
  p.cells.insert(p.cells.end(), a_cells.begin(), a_cells.end());
  check_product(at, p.cells);
  for (int r = 0; r < n_sum; r++) LANES to<u32>(w, o[r])[l] = 0x7fc0dead;  // NaN until it is waited for
  w.products.push_back(std::move(p));
}
void Machine::finish_product(Cta& c, Warp& w, Product& p) {
  const Instruction& i = *p.i;
  const s32* o = kernel.extra.data() + i.imm;
  int N = i.b, n_sum = N / 2, K = 32 / size_of(i.a);
  At at{c, w, 0, p.pc};
  if (schedule.late) tile(at, p.b_descriptor, 0, N, K, i.c & 4, i.a, p.b, nullptr);  // what is there at the wait
  if (!p.has_sum) {
    p.sum.resize(16 * N);
    for (int r = 0; r < n_sum; r++) LANES p.sum[sum_row(l, r) * N + sum_column(l, r)] = from<float>(w, o[r])[l];
  }
  double sign = (i.d & 1 ? -1.0 : 1.0) * (i.d & 2 ? -1.0 : 1.0);
  for (int m = 0; m < 16; m++) for (int n = 0; n < N; n++) {
    double sum = 0;
    for (int k = 0; k < K; k++) sum += (double)p.a[m * K + k] * p.b[n * K + k];
    p.sum[m * N + n] = (float)(p.sum[m * N + n] + sign * sum);
  }
  Product* next = nullptr;  // one that adds to the same registers and is under way keeps them from being read
  for (auto& other : w.products)
    if (&other > &p && !next && kernel.extra[other.i->imm] == o[0]) next = &other;
  if (next && !next->has_sum) next->sum = p.sum, next->has_sum = true;
  if (!next)
    for (int r = 0; r < n_sum; r++) LANES to<float>(w, o[r])[l] = p.sum[sum_row(l, r) * N + sum_column(l, r)];
  for (u32 g : p.cells) {
    c.read_by_products[g]--;
    if (schedule.races) on_read(c.cells[g], at, SHARED_BASE + g * shared_grain, 1, false, true);
  }
}
void Machine::wait_for_products(Cta& c, Warp& w, u32 but) {
  size_t done = 0;
  while (done < w.products.size() && (s64)w.products[done].group < (s64)w.product_group - (s64)but)
    finish_product(c, w, w.products[done++]);
  w.products.erase(w.products.begin(), w.products.begin() + done);
}
