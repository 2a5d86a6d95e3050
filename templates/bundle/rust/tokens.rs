//! The elements that tensors have, by the tokens of a step.

use crate::config::{or, Config};
use crate::error::GqaError;
use crate::layout::{check_len, check_reach};

const NAMES: [&str; 6] = ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"];

impl Config<'_> {
    /// Sequences and tokens of the queries, or one sequence of all tokens.
    pub(crate) fn queries(&self) -> [usize; 2] {
        match self.cu_seqlens_q {
            Some(_) => [1, self.total_tokens],
            None => [self.batch_size, or(self.num_tokens, 1)],
        }
    }

    /// The same of the new tokens.
    pub(crate) fn new_tokens(&self) -> [usize; 2] {
        let as_queries = or(self.num_tokens, 1);
        match self.cu_seqlens_k_new {
            Some(_) => [1, self.total_new_tokens],
            None => [self.batch_size, or(self.num_new_tokens, as_queries)],
        }
    }

    /// Query tokens of all sequences, in words.
    pub(crate) fn rule_of_queries(&self) -> &'static str {
        match (self.cu_seqlens_q, self.queries()) {
            (Some(_), _) => "total_tokens",
            (None, [_, 1]) => "batch_size",
            _ => "batch_size * num_tokens",
        }
    }

    /// The same of the new tokens.
    pub(crate) fn rule_of_new_tokens(&self) -> &'static str {
        match (self.cu_seqlens_k_new, self.new_tokens()) {
            (Some(_), _) => "total_new_tokens",
            (None, [_, 1]) => "batch_size",
            _ if self.num_new_tokens == 0 => "batch_size * num_tokens",
            _ => "batch_size * num_new_tokens",
        }
    }

    /// Checks the elements of what is read or written by token.
    pub(crate) fn check_tokens(&self) -> Result<(), GqaError> {
        let indices = [
            ("config: cu_seqlens_q", self.cu_seqlens_q),
            ("config: cu_seqlens_k_new", self.cu_seqlens_k_new),
        ];
        for (name, index) in indices {
            if let Some(it) = index {
                let needed = self.batch_size.saturating_add(1);
                check_len(name, it.len(), needed, "batch_size + 1")?;
            }
        }
        if let Some(it) = self.tree_mask {
            let [batch, tokens] = self.queries();
            let words = tokens / 32 + usize::from(tokens % 32 != 0);
            let needed = self.elements(&[batch, tokens, words])?;
            let rule = "batch_size * num_tokens, in words of 32 drafts";
            check_len("config: tree_mask", it.len(), needed, rule)?;
        }
        if let Some(it) = self.slot_mapping {
            let needed = self.elements(&self.new_tokens())?;
            let rule = self.rule_of_new_tokens();
            check_len("config: slot_mapping", it.len(), needed, rule)?;
        }
        if let Some(it) = self.lse {
            let [batch, tokens] = self.queries();
            let needed = self.elements(&[batch, tokens, self.num_q_heads])?;
            if it.len() != needed {
                let rule = format!("{} * num_q_heads", self.rule_of_queries());
                check_len("config: lse", it.len(), needed, &rule)?;
            }
        }
        Ok(())
    }

    /// Rows of the caches and their tokens, or pages and theirs.
    pub(crate) fn pool(&self) -> [usize; 2] {
        match self.block_table {
            None => [or(self.cache_rows, self.batch_size), self.max_seq_len],
            Some(_) => [self.num_pages, self.page_size],
        }
    }

    /// Checks the elements that output, q, k, v and the caches have.
    pub(crate) fn check_lens(&self, lens: [usize; 6]) -> Result<(), GqaError> {
        let [rows, room] = self.pool();
        let ([asking, queries], [growing, new]) = (self.queries(), self.new_tokens());
        let (q_heads, kv_heads, dim) = (self.num_q_heads, self.num_kv_heads, self.head_dim);
        let value_dim = or(self.head_dim_v, dim);
        let sizes = [
            [asking, queries, q_heads, value_dim],
            [asking, queries, q_heads, dim],
            [growing, new, kv_heads, dim],
            [growing, new, kv_heads, value_dim],
            [rows, room, kv_heads, dim],
            [rows, room, kv_heads, value_dim],
        ];
        let mut packed = [0; 6];
        for (packed, sizes) in packed.iter_mut().zip(&sizes) {
            *packed = self.elements(sizes)?;
        }
        for (i, strides) in self.strides.of_tensors().iter().enumerate() {
            if *strides != [0; 3] {
                check_reach(NAMES[i], lens[i], sizes[i], *strides)?;
            } else if lens[i] != packed[i] {
                check_len(NAMES[i], lens[i], packed[i], &self.rule_of(i))?;
            }
        }
        Ok(())
    }

    /// The elements of a tensor, in words.
    fn rule_of(&self, tensor: usize) -> String {
        let of_values = matches!(tensor, 0 | 3 | 5) && self.head_dim_v != 0;
        let dim = if of_values { "head_dim_v" } else { "head_dim" };
        match tensor {
            0 | 1 => format!("{} * num_q_heads * {dim}", self.rule_of_queries()),
            2 | 3 => format!("{} * num_kv_heads * {dim}", self.rule_of_new_tokens()),
            _ if self.block_table.is_some() => {
                format!("num_pages * page_size * num_kv_heads * {dim}")
            }
            _ => format!("batch_size * max_seq_len * num_kv_heads * {dim}, or with cache_rows"),
        }
    }
}
